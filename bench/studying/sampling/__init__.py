"""What a batch knows of D of the data set, along trainings, and what that is worth."""
