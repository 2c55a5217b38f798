"""A page to try a calibrator on: the plain and the guided model's continuations of one prompt, side by side."""
