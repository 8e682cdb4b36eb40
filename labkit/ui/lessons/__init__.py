"""Views of single notebooks: each module is one view, used in one lesson.

What every view builds on (figures, the explorer, the panel, tables, static twins) is one folder up.
"""
