"""The model, its loss, optimizer, learning rate and average: pure parts that a trainer puts
together."""
