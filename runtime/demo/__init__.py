"""What `llm42 demo` does: one job run in three ways (`job`), and plain PyTorch as a control (`control`)."""
