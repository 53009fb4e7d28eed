"""Making a finished student and its index smaller, and measuring what each step costs."""
