"""The networks: the teacher, the student, their tokenizers, and how one begins from the other."""
