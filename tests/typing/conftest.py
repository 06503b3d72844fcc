"""What is there for type checkers alone is not run."""

collect_ignore = ["user_code.py"]
