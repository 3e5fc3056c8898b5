"""Trained weights for use: files that other programs load.

In: a model with its weights, and a `Description` of it: classes, evaluation settings, metrics,
recipe. Out: a folder that timm loads and the Hugging Face Hub shows, with `torch.export` and ONNX
programs on request (`formats`, `card`). `app` is a file of the app that the command app writes.
"""
