"""Exit statuses of every command; 0 is success."""

FAILED = 1  # the command ran and says no: bits differ, or something broke on our side
BAD_INPUT = 2
INTERRUPTED = 130
