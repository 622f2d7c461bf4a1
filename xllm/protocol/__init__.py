"""What actors say to each other (one file a conversation) and how it travels."""
