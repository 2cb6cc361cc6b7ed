"""What the Ascend export needs beyond one target file: chips, linter, cost model, static graphs."""
