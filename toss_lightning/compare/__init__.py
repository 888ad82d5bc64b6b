"""Methods x seeds from one file: what is run, and what the differences between the methods are worth."""
