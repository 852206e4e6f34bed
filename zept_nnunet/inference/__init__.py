"""What a trained model folder can be turned into."""
