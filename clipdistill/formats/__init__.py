"""Writing the student in the layouts that other libraries and services read, each proved by its own reader."""
