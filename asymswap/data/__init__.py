"""Images, arrays, their splits and preprocessing."""
