"""Experiments: claims of the literature at small scale, each in a short file to read and change.

Each has `run(subject, out, say)`, which writes results.json, table.md and images to the folder
`out`. subject: for how many seconds to train, or for those in `ON_A_RUN` the folder of a
trained run. `cli.experiment` lists them all.
"""
