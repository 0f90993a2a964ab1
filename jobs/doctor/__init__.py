"""``pgscribe doctor``: what is wrong with this set-up, in plain words, and how to mend it."""
