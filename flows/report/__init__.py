"""The page of `grpo report`: one HTML file that opens offline. Its template, script and styles lie in page/.

render.py   the page, from what stages/inspect/report_data.py collects
figures.py  its figures, drawn as SVG
"""
