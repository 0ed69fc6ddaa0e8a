"""The restricted login shell: one process per person, the person's uid, no rights; third-party code only in `prompt.py`.

It reads a line, finds it in one table of verbs (`verbs.py`), sends one typed message to the broker (`client.py`) and shows
the answer (`show.py`), or copies bytes between the terminal and a console descriptor the broker handed it (`console.py`).
There is nothing behind it to escape to (rule R20): no shell, no pager, no editor, no files.
"""
