"""Model and budget to plan: what is opened, chosen, built, timed and checked."""
