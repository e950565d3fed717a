"""What several tests share: tiny models, tiny runs, processes, files."""
