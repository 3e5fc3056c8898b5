"""The model, its loss, optimizer, learning rate and averages. They are independent of each other;
the trainer combines them."""
