"""From video files to training batches: pack once, plan each clip, decode only what is used."""
