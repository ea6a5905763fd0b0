"""The benchmark harness behind `llm42 bench`: workloads, engines, measurements, CSV."""
