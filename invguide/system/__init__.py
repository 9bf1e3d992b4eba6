"""What is around a run: devices, threads, memory, files, hashes, progress, tables. Knows nothing of problems."""
