"""What Hugging Face folders and models are like, told without importing torch."""
