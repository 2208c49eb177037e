"""Files, JSON, memory, threads, progress and tables: nothing here knows of models."""
