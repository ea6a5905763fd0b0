"""The ``llm42::`` operators: one file each, with schema, fake, fp64 reference and reduction order."""
