"""What an exported folder says of itself: the exporter writes it, whoever runs it reads it."""
