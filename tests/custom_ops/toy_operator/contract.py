"""The toy's contract."""

OP_TYPE = "ToyOperator"
