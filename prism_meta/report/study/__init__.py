"""What the runs of a study show: averages, paired differences to a reference, and the page with them."""
