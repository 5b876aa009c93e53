"""Programs to run and to start from: `python -m deepsim_ext.examples.fast_style`."""
