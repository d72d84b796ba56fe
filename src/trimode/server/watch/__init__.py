"""Shows in a browser how texts are decoded."""
