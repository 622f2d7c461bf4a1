"""One model instance: its scheduler, its sequences, its workers."""
