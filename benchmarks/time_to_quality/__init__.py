"""What cheaper rollouts cost the result, on toys: quality over counted FLOPs and over seconds."""
