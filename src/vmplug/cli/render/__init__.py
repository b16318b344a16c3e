"""How does an answer look: tables, trees and JSON.

In: values of the library. Out: text on stdout.
"""
