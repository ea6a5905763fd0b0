"""The survey: every decoder class of the installed transformers, tiny and random, through both doors.

`classes` lists them, `tiny` builds them, `mixing` says how they mix tokens, `cells` tests them (with
`call_by_call` where Inductor is left out), `pool` keeps each in a worker process with a time limit, `results`
keeps what was found in files, `page` writes docs/models.md. `llm42 survey` is the command.
"""
