"""Images: how an image file becomes the model's input, and back."""
