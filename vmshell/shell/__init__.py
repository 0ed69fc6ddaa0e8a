"""The restricted login shell: one process per person, the person's uid, no rights; third-party code only in `ui/prompt.py`.

It reads a line, finds it in one table of verbs (`cli/verbs.py`), sends one typed message to the broker (`client/broker.py`) and
shows the answer (`ui/output.py`), or copies bytes between the terminal and a console that the broker handed it (`console/`).
There is nothing behind it to escape to (rule R20): no shell, no pager, no editor, no files.
"""
