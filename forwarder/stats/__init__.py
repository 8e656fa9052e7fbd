"""What is counted: why sessions end, the words and rows of a board, and the sums over boards.

A worker writes its own board; the master reads all of them. Logs nothing and limits nothing.
"""
