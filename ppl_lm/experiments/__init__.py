"""The paper's claims, each one short command: `python -m ppl_lm.experiments NAME`.

An experiment is one file here with `run(seed) -> Result`. All but `calibration`, `decoding` and
`divergences` enumerate every text, so that their figures have no error but that of the fit."""
