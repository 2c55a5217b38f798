"""What a target and a method say to given text: nothing is sampled."""
