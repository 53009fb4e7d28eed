"""Weight inheritance: a student that is cut out of its teacher, or out of a larger student."""
