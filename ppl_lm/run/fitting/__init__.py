"""Fitting a guide: the loop, its learning rate, what is watched and which guide is kept."""
