"""What is written: model, weights, manifest, companions."""
