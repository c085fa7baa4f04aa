"""The parts of tests/gpu/run.py: each module holds a few, each part is a function of a part.Part."""
