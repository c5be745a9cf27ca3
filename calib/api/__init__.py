"""The library's functions that run a model. `calib` exports them."""
