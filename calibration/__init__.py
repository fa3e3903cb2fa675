"""Turn a Hugging Face model into a smoothed INT8 checkpoint: `from calibration.pipeline import calibrate`.

Nothing is imported here, so that `smoothquant --help` answers at once.
"""
