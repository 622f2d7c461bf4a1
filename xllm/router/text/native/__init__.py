"""What is compiled of the text side: the search for the words of a text."""
