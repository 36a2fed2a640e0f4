"""What paygate is compared with: a payment API of Django, Django REST Framework and the package paystack-django.

It does what their documentation shows, with the settings that `django-admin startproject` writes. Where there is a
choice it has the cheaper one: paystack-django's client is made once and keeps its connections, and a payment's row is
written once, after Paystack's answer. Its routes and answers have the shape of paygate's, so that the same requests
measure both.
"""
