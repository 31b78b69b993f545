"""What is a matrix in a tree of parameters, and stacks of them: knows no optimizer."""
