"""Reconstruction: training on the outputs of one block, which tuners and transforms share."""
