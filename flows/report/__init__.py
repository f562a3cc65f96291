"""The page of `grpo report`: one HTML file that opens offline. Its template, scripts and styles are in page/.

render   the page, from the data of stages.inspect.report_data
live     the same page, served on loopback while the run goes on
figures  its figures, drawn as SVG
"""
