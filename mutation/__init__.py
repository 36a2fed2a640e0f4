"""Mutants: small breaks of the code that keeps the promises, each of which some test must notice.

    make mutation ARGS='--sample 200 --seed 1'

`tracing` learns which tests run which lines, `mutants` and `schema` make the breaks, `runner` tries them.
"""

TRACE_FOLDER = "MUTATION_TRACE"
"""The name of the variable that holds the folder where the tests' lines are written down."""
